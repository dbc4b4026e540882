"""`python -m mmchat`: the command line, where its script is not on the PATH."""

from mmchat.cli import main

if __name__ == "__main__":
    main()
