"""`python -m steprule`: the command line."""

from steprule.lab.cli import main

if __name__ == "__main__":
    main()
