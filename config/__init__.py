"""
Settings: a frozen dataclass, then files, then the command line.

    python train.py config/demo.py --batch_size=4 --learning_rate=1e-3

A config file is Python: assignments with remarks, in which arithmetic is welcome. Names that start with _ are
its own. A name that is no field of the dataclass, in a file or on the command line, ends the run with a
sentence that names the nearest one; and every value has to fit the type of its field.
"""
import argparse
import ast
import difflib
import inspect
import runpy
from dataclasses import fields
from types import UnionType
from typing import get_args, get_type_hints


def load(Config, argv):
    """-> Config with the settings of the files and of --key=value in argv; later ones win. SystemExit for any
    that is wrong."""
    settings = {}
    for arg in argv:
        if arg in ('-h', '--help'):
            print(help_text(Config))
            raise SystemExit(0)
        if not arg.startswith('--'):
            settings_here = read_file(arg)
        elif '=' in arg:
            key, _, text = arg[2:].partition('=')
            settings_here = {key: read_value(text)}
        else:
            raise SystemExit(f'{arg}: settings are given as {arg}=VALUE')
        for key, value in settings_here.items():
            where = arg if arg.startswith('--') else f'{arg}: {key} = {value!r}'
            settings[key] = fit(Config, key, value, where)
    try:
        return Config(**settings)
    except ValueError as error:     # from the dataclass's own __post_init__: settings that don't go together
        raise SystemExit(str(error))


def read_file(path):
    try:
        names = runpy.run_path(path)
    except FileNotFoundError:
        raise SystemExit(f'no config file {path}; settings are given as --key=value')
    except SyntaxError as error:
        raise SystemExit(f'{path}:{error.lineno}: {error.msg}')
    except Exception as error:      # the user's file can raise anything, and the user can mend it
        raise SystemExit(f'{path}: {type(error).__name__}: {error}')
    names = {key: value for key, value in names.items() if not key.startswith('_')}
    return {key: value for key, value in names.items() if not inspect.ismodule(value)}


def read_value(text):
    """'1e-4' -> 0.0001, 'false' -> False, 'none' -> None; what is no Python literal is a string."""
    words = {'true': True, 'false': False, 'none': None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def fit(Config, key, value, where):
    types = get_type_hints(Config)
    if key not in types:
        near = difflib.get_close_matches(key, types, 1, 0)[0]
        raise SystemExit(f'{where}: no setting {key!r}; did you mean {near!r}?')
    kinds = get_args(types[key]) if isinstance(types[key], UnionType) else (types[key],)
    if type(value) in kinds:
        return value
    if value is None and type(None) in kinds:
        return None
    if float in kinds and type(value) is int:
        return float(value)
    if int in kinds and type(value) is float and value.is_integer():    # 1e6 is a float to Python
        return int(value)
    if str in kinds and not isinstance(value, (list, dict)) and where.startswith('--'):
        return where.partition('=')[2]                                  # a folder may be named 2024
    kinds = ' or '.join('None' if kind is type(None) else kind.__name__ for kind in kinds)
    raise SystemExit(f'{where}: {key} has to be {kinds}, not {type(value).__name__} {value!r}')


def help_text(Config):
    lines = inspect.getsource(Config).split('\n')
    start = next(i for i, line in enumerate(lines) if line.startswith('class')) + 1
    body = [line[4:] for line in lines[start:]]
    stop = next((i for i, line in enumerate(body) if line.startswith(('def ', '@'))), len(body))
    usage = (inspect.getdoc(inspect.getmodule(Config)) or '').strip()
    return f'{usage}\n\nSettings, with their defaults:\n\n' + '\n'.join(body[:stop]).strip('\n')


def save(cfg, path):
    """The finished settings as a config file, which runs again."""
    with open(path, 'w', encoding='utf-8') as file:
        for field in fields(cfg):
            file.write(f'{field.name} = {getattr(cfg, field.name)!r}\n')


class Parser(argparse.ArgumentParser):
    """For scripts with few settings. A mistake ends in one sentence and code 1, as any other does."""

    def error(self, message):
        raise SystemExit(f'{message}; see --help')
