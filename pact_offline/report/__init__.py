"""Many metrics.json as one page."""

import logging

# Where home cannot be written to it keeps its cache elsewhere for the while, and says so each time.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
