import sys

from xencrash.cli import main

sys.exit(main())
