import sys

from fastpose.cli import main

sys.exit(main())
