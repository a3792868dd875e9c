"""``python -m autodeco``, which is what torchrun starts."""

from autodeco.cli import main

if __name__ == "__main__":
    main()
