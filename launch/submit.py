"""One command for all stages: python launch/submit.py --stage all|value|policy|evaluate [--config NAME] ..."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, not launch/, is where imports start

from hvd.launch.submit import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
