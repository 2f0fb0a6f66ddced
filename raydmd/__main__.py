"""``python -m raydmd``: the commands, where the script of that name is not on the PATH."""

from raydmd.entry import main

if __name__ == "__main__":
    main()
