"""The commands of ``ppap analyze``, a module each, whose ``main(argv)`` is called with the arguments after its name."""
