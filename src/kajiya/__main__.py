"""`python -m kajiya`."""

from kajiya.cli import main

main()
