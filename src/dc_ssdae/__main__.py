"""`python -m dc_ssdae` is `dc-ssdae`."""

import sys

from dc_ssdae.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
