"""DPO training with the flags of the original script; the same command as `preftree train`."""

import sys

from preftree.cli import main_train

if __name__ == "__main__":
    sys.exit(main_train(sys.argv[1:]))
