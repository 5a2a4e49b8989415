"""Hears no SIGTERM and never ends: what somebody presses Ctrl-C twice for."""

import signal
import sys
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdout.write("nothing ends me\n")
sys.stdout.flush()
while True:
    time.sleep(1)
