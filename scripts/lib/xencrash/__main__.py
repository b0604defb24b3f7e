from __future__ import annotations

import sys

from xencrash.cli import main

sys.exit(main())
