"""The commands of ``ppap analyze``, a module each; ``main(argv)`` takes the arguments after the name."""
