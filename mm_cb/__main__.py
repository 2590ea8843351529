"""``python -m mm_cb``: the command line, where the ``mm-cb`` script is not on the path."""

from mm_cb.cli import main

if __name__ == "__main__":
    main()
