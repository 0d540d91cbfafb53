"""Files that appear whole or not at all, JSON whose errors name the file, names in a message and of files."""
import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager


@contextmanager
def whole(path, suffix='.part'):
    """
    Gives a path to write to, a file or a folder, which becomes `path` when the block ends. So `path` is never
    half written: a process that is killed in the block leaves the old one. If the block raises, what it wrote
    is deleted.

        with whole('a.json') as part, open(part, 'w') as file:
            json.dump(content, file)

    Processes that write the same path at once need a suffix of their own.
    """
    path = os.fspath(path)
    part = path + suffix
    remove(part)    # of a process that was killed
    try:
        yield part
        if os.path.isdir(part):
            remove(path)    # a folder takes the place of none but an empty one
        os.replace(part, path)
    except BaseException:
        remove(part)
        raise


def remove(path):
    """A file, or a folder with all that is in it; nothing where there is neither."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def some(names, n=10):
    """'a, b, c' for a message: of many names the first ten, and how many there are more"""
    names = list(map(str, names))
    return ', '.join(names[:n]) + f' and {len(names) - n} more' * (len(names) > n)


def as_text(text):
    """The same in characters that can be written: half a surrogate pair, which JSON may hold, is U+FFFD."""
    return text if text.isascii() else text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def printable(text):
    """A stranger's name or message for a terminal: what moves the cursor or turns the direction of writing
    becomes U+FFFD."""
    return text if text.isprintable() else ''.join(c if c.isprintable() else '\ufffd' for c in text)


def file_name(id):
    """
    A name for the files of an id, whatever it holds: no part of a path, at most 200 bytes long. Where it is
    not the id itself, a hash keeps two ids apart.

    >>> file_name('test-00001-Andy'), file_name('a/b'), file_name('../x')
    ('test-00001-Andy', 'a_b-c14cddc0', '.._x-d6b96a97')
    """
    name = re.sub(r'[^\w.-]', '_', id)
    if name == id and 0 < len(name.encode()) <= 200 and not name.startswith('.'):
        return name
    cut = name.encode()[:190].decode(errors='ignore')
    return f'{cut}-{hashlib.sha256(id.encode(errors="replace")).hexdigest()[:8]}'


# a file in UTF-8 that can hold whatever JSON can: half a surrogate pair is written as \ud800, as JSON has it
JSON_TEXT = dict(encoding='utf-8', errors='backslashreplace')


def write_json(path, content):
    with whole(path) as part, open(part, 'w', **JSON_TEXT) as file:
        json.dump(content, file, indent=1, ensure_ascii=False)


def write_jsonl(path, rows):
    with whole(path) as part, open(part, 'w', **JSON_TEXT) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


def read_json(path):
    """The object in a JSON file. Raises ValueError, one sentence with the path, where there is none."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except OSError as error:
        raise ValueError(f'{path}: {error.strerror}') from None
    except (ValueError, RecursionError) as error:     # broken UTF-8; RecursionError: 100,000 brackets
        raise ValueError(f'{path} is no JSON ({error})') from None
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds no JSON object')
    return content


def read_jsonl(path):
    """(row, object) of each line of a file, of standard input if path is '-'. Raises ValueError, with path
    and row, for a line that is no JSON object."""
    try:
        with sys.stdin if path == '-' else open(path, encoding='utf-8') as file:
            for row, line in enumerate(file, 1):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise ValueError(f'{path}:{row}: not a JSON object')
                    yield row, value
    except OSError as error:
        raise ValueError(f'{path}: {error.strerror}') from None
    except UnicodeDecodeError:
        raise ValueError(f'{path}: not a text file in UTF-8') from None
    except (json.JSONDecodeError, RecursionError) as error:     # RecursionError: a line of 100,000 brackets
        raise ValueError(f'{path}:{row}: not JSON ({error})') from None
