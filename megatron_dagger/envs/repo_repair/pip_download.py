"""Download named source distributions with pip's own finder and session. Run as a script by sdists.py.

It may run under another Python than the package's, one that has pip, so it imports only the standard library and pip.
Standard input is a JSON list of {name, sdist, path}. Each file is written to its path, unverified. The script stops at
the first file it cannot download and prints the reason to standard error.

``pip download`` would not do: for a source distribution it first builds the metadata, which needs every package's own
build tools. The three methods of pip used here are unchanged since pip 20.3.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    # The script's own folder comes first on the path; its modules must not shadow pip's.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    from pip._internal.commands import create_command

    downloads = json.load(sys.stdin)
    command = create_command("download")
    options, _ = command.parse_args(["--no-binary=:all:", "--retries=2", "--timeout=20", downloads[0]["name"]])
    with command.main_context():
        session = command.get_default_session(options)  # type: ignore[attr-defined]
        finder = command._build_package_finder(options, session)  # type: ignore[attr-defined]
        for item in downloads:
            try:
                links = [candidate.link for candidate in finder.find_all_candidates(item["name"])]
                link = next((link for link in links if link.filename == item["sdist"]), None)
                if link is None:
                    raise LookupError(f"no index that pip is configured with offers {item['sdist']}")
                if link.is_file:
                    content = Path(link.file_path).read_bytes()
                else:
                    response = session.get(link.url_without_fragment, headers={"Accept-Encoding": "identity"})
                    response.raise_for_status()
                    content = response.content
                Path(item["path"]).write_bytes(content)
            except Exception as error:  # pip raises errors of many kinds
                sys.stderr.write(f"{error}\n")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
