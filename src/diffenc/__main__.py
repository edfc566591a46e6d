"""The program `diffenc`, as `python -m diffenc`."""

from diffenc.cli.main import main

if __name__ == "__main__":
    main()
