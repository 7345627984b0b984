"""What the Triton implementations share; start at ``device.py`` for the kernels' building blocks.

``device``: functions inlined into kernels. ``planes``: operands of tensor-core products. ``launch``: tile
sizes per architecture. ``autotune``: their search. ``bits``: the layout of masks between kernels.
"""
