"""Files and the screen: atomic writes, JSON lines, the cache folder, the run folder, console and progress."""
