"""``python -m fastl2o``: the command line."""

from .cli import main

main()
