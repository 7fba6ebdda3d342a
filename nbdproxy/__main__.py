"""`python -m nbdproxy` is `nbdproxy`."""

from nbdproxy.cli.app import main

main()
