"""`python -m headway`, for torchrun and for those without the command on their path."""

from headway.cli import main

main()
