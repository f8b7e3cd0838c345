"""LeRobot v2.0: the files of v2.1. They differ in the statistics of the meta folder, which hvd does not read."""

from hvd.data.layout import Format, count_rows
from hvd.data.layout.lerobot_v21 import describe

FORMAT = Format("v2.0", describe, rows=count_rows)
