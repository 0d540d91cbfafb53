"""
What a folder holds, so that damage is found before it is used: the size and SHA-256 of each file in it.

    manifest.json       {"model.safetensors": [8123456, "9f86d081…"], "codec/codec.json": [187, "60303…"], …}
"""
import hashlib
import os

from common.files import read_json, write_json

NAME = 'manifest.json'
PIECE = 2 ** 20         # bytes that are read at once


def list_files(folder):
    """-> the names of all files in a folder and below, like 'codec/codec.json', but for the manifest's own"""
    paths = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    names = (os.path.relpath(path, folder).replace(os.sep, '/') for path in paths)
    return sorted(name for name in names if name != NAME)


def fingerprint(path, is_new=False):
    """-> [size in bytes, SHA-256] of a file. is_new: only once it is on the disk, not just in memory."""
    digest, piece, size = hashlib.sha256(), memoryview(bytearray(PIECE)), 0
    with open(path, 'rb', buffering=0) as file:
        if is_new:
            os.fsync(file.fileno())
        while n := file.readinto(piece):
            digest.update(piece[:n])
            size += n
    return [size, digest.hexdigest()]


def write_manifest(folder):
    """Makes manifest.json of the files that lie in a folder: the last thing that is written there."""
    write_json(os.path.join(folder, NAME),
               {name: fingerprint(os.path.join(folder, name), is_new=True) for name in list_files(folder)})


def read_manifest(folder):
    """-> {name: [size, SHA-256]}; None for a folder without one. Raises ValueError for a broken manifest."""
    path = os.path.join(folder, NAME)
    return read_json(path) if os.path.lexists(path) else None


def find_damage(folder):
    """-> what is not as it was written, ['model.safetensors is missing', …], so [] for a folder that is
    whole; None for a folder without a manifest. Files that the manifest does not name may come and go."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return [f'{NAME} is broken']
    if manifest is None:
        return None
    found = []
    for name, expected in manifest.items():
        path = os.path.join(folder, name)
        try:
            actual = fingerprint(path) if os.path.isfile(path) else None    # no device, no pipe
        except OSError as error:
            found.append(f'{name} cannot be read: {error.strerror}')
            continue
        if actual is None:
            found.append(f'{name} is missing')
        elif actual != expected:
            found.append(f'{name} is ' + ('not as it was written' if actual[0] else 'empty'))
    if found and read_manifest(folder) != manifest:     # a run has published a better model meanwhile
        return find_damage(folder)
    return found
