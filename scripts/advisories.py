"""Is there anything for `make audit` to ask? One sentence and exit code 3 where PyPI's advisories cannot be reached.

pip-audit reads them from PyPI's page of a release. A mirror may have the packages and not these pages, and then
pip-audit calls every package unknown.
"""

import json
import sys
import urllib.error
import urllib.request

#: A release with known vulnerabilities that will not go away.
ADDRESS = "https://pypi.org/pypi/requests/2.19.1/json"


def main(address: str = ADDRESS) -> int:
    try:
        with urllib.request.urlopen(address, timeout=30) as page:
            known = json.load(page).get("vulnerabilities")
        why = None if known else "the page of a release with known vulnerabilities lists none"
    except (OSError, ValueError) as problem:
        why = str(problem)
    if why is None:
        return 0
    print(
        f"error: nothing was audited, since PyPI's advisories cannot be had from here ({address}: {why})",
        file=sys.stderr,
    )
    return 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
