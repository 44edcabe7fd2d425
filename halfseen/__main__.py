"""``python -m halfseen COMMAND ...``."""

from halfseen.cli import main

main()
