"""Making what training reads: ``crops`` (five-crop folders), ``potsdam`` (blocks of raw tiles), ``verify``
(every file decoded). ``ppap/prepare.py`` is the command.
"""
