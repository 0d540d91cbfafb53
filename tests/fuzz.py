"""
Damages small files and reads them: does all that can be wrong end in a sentence, or skipped and counted?

    python tests/fuzz.py                            10,000 inputs, about half an hour on a core
    python tests/fuzz.py --n=500 --reader=arrow     one reader
    python tests/fuzz.py --reader=arrow --input=17  one input, with its traceback

Each reader (fuzz_seeds.py) gets small whole files, one or two of which are damaged: bits flip, pieces are cut
out or doubled, numbers in headers become huge; in JSON what stands somewhere becomes something else, of what
hypothesis draws or of a list of nasty texts and numbers; tars get paths that lead outside, links, devices.
Each input follows from the reader and its number.

Readers run in processes of their own, with 20 s for an input and 8 GiB of addresses. Of each there is a line:

    inputs         tried
    refused        ended in one sentence
    skipped        some of it was left out, and counted
    accepted       read as if nothing were wrong: what was damaged nobody reads, or has no checksum, as a wav
    tracebacks     any other exception
    unnoticed      what has a checksum (Arrow files, the codec) gave other content than was written
    hangs          no end after 20 s, or a crash
    half-written   a folder is left that is neither whole nor absent
"""
import argparse
import contextlib
import gzip
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path

COLUMNS = 'inputs refused skipped accepted tracebacks unnoticed hangs half-written'.split()
LIMIT_SEC, LIMIT_BYTES = 20, 8 * 2 ** 30
HUGE = [0, 1, -1, 127, 128, 255, 2 ** 15, 2 ** 16 - 1, 2 ** 31 - 1, -2 ** 31, 2 ** 32 - 1, 2 ** 62,
        2 ** 63 - 1, -2 ** 63]
NASTY = ['', ' ', '\0', 'a\0b', '../../x', '/etc/passwd', '/' + 'x' * 300, 'x' * 300, '\u202egnp.exe',
         '\ud800', 'a\udfffb', '<|eot|>', '<|endoftext|>', '<|s_3|>', '</script><script>alert(1)</script>',
         '\x1b[31m', '\r\n', '\ufeff', '𝔘𝔫𝔦', 'é' * 100, '1e999', 'nan', 'pipe:touch /tmp/x', '%s%n', '-1',
         'http://127.0.0.1:9/x', '~', '*', '{a,b}', 'a' * 100000, '<|5|>', '[silence]']
NUMBERS = [0, -1, 1, 0.5, -0.5, 1e9, 1e300, -1e300, 1e-300, float('nan'), float('inf'), -float('inf'),
           2 ** 31, 2 ** 63, 2 ** 64, 10 ** 400, True, None, [], {}, [[]], [None], {'a': None}]


# ------------------------------------------------------------------------------------------------------------
# damage

def damage_bytes(content, rng):
    """bytes -> other bytes"""
    data, n = bytearray(content), len(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, size = rng.randrange(max(1, len(data))), rng.choice((1, 2, 4, 8, 64, 512, 4096))
        if rng.random() < 0.4:      # heads and tails say what is where
            at = rng.choice((at % 256, max(0, len(data) - 1 - at % 1024)))
        match rng.randrange(8) if data else 6:
            case 0 | 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at:]
            case 3:
                del data[at:at + size]
            case 4:
                data[at:at] = data[at:at + size]
            case 5:
                data[at:at + size] = rng.randbytes(min(size, len(data) - at))
            case 6:
                data[at:at] = rng.randbytes(size)
            case 7:
                form, size = rng.choice((('<I', 4), ('>I', 4), ('<Q', 8), ('>Q', 8), ('<H', 2)))
                at -= at % rng.choice((1, size))
                data[at:at + size] = struct.pack(form, rng.choice(HUGE) % 2 ** (8 * size))
    return bytes(data if n < 10 ** 7 else data[:n])


def places(value, path=()):
    """Paths to all that is in a JSON value, itself too"""
    yield path
    if not isinstance(value, dict | list):
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from places(item, (*path, key))


def damage_json(value, rng, drawn):
    """A JSON value -> another. drawn: values of hypothesis"""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 4))):
        path = rng.choice(list(places(value)))
        if not path:
            if rng.random() < 0.2:
                value = rng.choice((rng.choice(drawn), [], {}, None, [value], {'a': value}))
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key = path[-1]
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1:
                holder[key] = rng.choice(NUMBERS)
            case 2 | 3:
                holder[key] = rng.choice(NASTY)
            case 4 | 5:
                holder[key] = rng.choice(drawn)
            case 6:
                holder[key] = [holder[key]] * rng.choice((0, 1, 2, 1000))
            case 7:
                if isinstance(holder, list):
                    holder.append(holder[key])
                else:
                    holder[rng.choice((*NASTY[:12], *holder))] = holder[key]
    return value


def draw(number, n=200):
    """n JSON values by hypothesis"""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st
    text = st.text(st.characters(), max_size=20)        # lone surrogates, too
    plain = st.none() | st.booleans() | st.integers() | st.floats() | text
    found = []

    @seed(number)
    @settings(max_examples=n, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(st.recursive(plain, lambda inner: st.lists(inner, max_size=4)
                        | st.dictionaries(text, inner, max_size=4), max_leaves=12))
    def collect(value):
        found.append(value)
    collect()
    return found


def damage_text(name, content, rng, drawn):
    """The bytes of a JSON or JSON lines file -> other bytes"""
    try:
        if name.endswith('.jsonl'):
            rows = [json.loads(line) for line in content.splitlines()]
            at = rng.randrange(len(rows))
            rows[at] = damage_json(rows[at], rng, drawn)
            if rng.random() < 0.1:
                rows.append(rng.choice(rows))
            text = '\n'.join(map(json.dumps, rows)) + '\n'
        else:
            text = json.dumps(damage_json(json.loads(content), rng, drawn))
    except ValueError:      # no JSON: 10 ** 400 is no float
        return damage_bytes(content, rng)
    if rng.random() < 0.03:
        text = text[:5] + '[' * 100000
    return text.encode('utf-8', 'surrogatepass' if rng.random() < 0.5 else 'replace')


def damage_tar(content, rng, drawn):
    """A tar -> one of whose files something is wrong, or that has a file too many"""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar, \
            tarfile.open(fileobj=out, mode='w', format=rng.choice((0, 1, 2))) as new:
        members = [(member, tar.extractfile(member).read() if member.isreg() else b'') for member in tar]
        at = rng.randrange(len(members))
        member, data = members[at]
        match rng.randrange(5):
            case 0 | 1:
                members[at] = member, damage(member.name, data, rng, drawn)
            case 2:
                member.name = rng.choice(('../../x.json', '/tmp/x.flac', 'x' * 300 + '.json', 'a\0b', '', '.',
                                          '..', member.name + '/y', 'é\udcff.flac'))
            case 3:
                member.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
                                          tarfile.DIRTYPE,
                                          tarfile.GNUTYPE_SPARSE, b'?'))
                member.linkname = rng.choice(('/etc/passwd', '../../x', member.name, ''))
            case 4:
                members.append(members[at])
        for member, data in members:
            member.size = len(data)
            with contextlib.suppress(ValueError, UnicodeError):         # what tarfile itself does not write
                new.addfile(member, io.BytesIO(data))
    return out.getvalue()


def damage(name, content, rng, drawn):
    """The bytes of a file -> other bytes, by its kind"""
    if name.endswith('.gz') and rng.random() < 0.7:
        return gzip.compress(damage(name[:-3], gzip.decompress(content), rng, drawn), 1)
    if name.endswith('.tar') and rng.random() < 0.7:
        return damage_tar(content, rng, drawn)
    if name.endswith(('.json', '.jsonl')) and rng.random() < 0.8:
        return damage_text(name, content, rng, drawn)
    if name.endswith(('.tsv', '.csv', '.txt', '.srt', '.ctm', '.TextGrid', '.text')) and rng.random() < 0.5:
        words = content.decode().split(' ')
        words[rng.randrange(len(words))] = str(rng.choice((*NASTY, *NUMBERS[:17])))
        return ' '.join(words).encode('utf-8', 'replace')
    return damage_bytes(content, rng)


# ------------------------------------------------------------------------------------------------------------
# one input

def is_sentence(text):
    """What a user can be shown: printable, of a length that can be read"""
    return 0 < len(text) < 3000 and 'Traceback' not in text


def leftover(out):
    """What lies in the folder of a prepare.py that should not, '' if nothing"""
    if not out.exists():
        return ''
    names = {path.name for path in out.iterdir()}
    if any('.part' in name for name in names):
        return f'a part is left: {names}'
    whole = {'train.arrow', 'val.arrow', 'test.arrow'}
    if names & whole and not whole <= names:
        return f'only {names & whole} is there'
    return ''


def try_one(reader, seeds, name, number, folder, drawn):
    """-> (the column it belongs to, what was said)"""
    rng = random.Random(f'{name} {number}')
    here, out = folder / 'in', folder / 'out'
    for path in (here, out):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(seeds, here)
    victims = sorted(path for pattern in reader.victims for path in here.glob(pattern) if path.is_file())
    for victim in rng.sample(victims, min(len(victims), rng.choice((1, 1, 1, 2)))):
        victim.write_bytes(damage(victim.name, victim.read_bytes(), rng, drawn))
    clear_caches()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            n, n_skipped = reader.read(here, out)
        column, said = ('skipped', f'{n_skipped}') if n_skipped else ('accepted', f'{n}')
    except (ValueError, SystemExit) as error:
        said = str(error)
        # not UnicodeDecodeError, JSONDecodeError, …: their messages name no file
        is_ours = type(error) in (ValueError, SystemExit) and is_sentence(said)
        column = 'refused' if is_ours else 'tracebacks'
        said = said if is_ours else traceback.format_exc()
    except AssertionError as error:
        column = 'unnoticed' if 'unnoticed' in str(error) else 'tracebacks'
        said = traceback.format_exc()
    except Exception:
        column, said = 'tracebacks', traceback.format_exc()
    left = leftover(out) or leftover(here / 'done')
    return ('half-written', f'{left} after {said}') if left else (column, said)


def clear_caches():
    from data import sides, words
    from data.webdataset import prepare as webdataset
    for cached in (sides.tar_index, words.ctm_index, webdataset.unpack):
        cached.cache_clear()


# ------------------------------------------------------------------------------------------------------------
# processes

def work(name, numbers, top, pipe):
    """A process: tries the inputs, and says a line of JSON of each."""
    import fuzz_seeds
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fuzz_seeds.CODEC = top / 'codec'
    reader, seeds = fuzz_seeds.READERS[name], top / 'seeds' / name
    if not seeds.exists():
        seeds.mkdir(parents=True)
        reader.write(seeds)
    drawn = draw(numbers[0] // 1000)
    print('ready', file=pipe, flush=True)
    for number in numbers:
        column, said = try_one(reader, seeds, name, number, top / 'work' / name, drawn)
        print(json.dumps([number, column, said]), file=pipe, flush=True)


def start(name, numbers, top):
    """-> pid, the end to read its lines from"""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    os.close(read)
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        with open(write, 'w') as pipe:
            work(name, numbers, top, pipe)
        status = 0
    finally:
        os._exit(status)


def listen(name, numbers, top):
    """Yields (number, column, what was said) of each input. A process that hangs is ended, and another goes
    on."""
    while numbers:
        pid, read = start(name, numbers, top)
        rest, buffer, limit_sec = list(numbers), b'', 120       # the first line says that files are written
        while rest:
            if not select.select([read], [], [], limit_sec)[0]:
                break
            block = os.read(read, 1 << 16)
            if not block:
                break
            *lines, buffer = (buffer + block).split(b'\n')
            for line in lines:
                limit_sec = LIMIT_SEC
                if line != b'ready':
                    rest.pop(0)
                    yield json.loads(line)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(read)
        if rest and limit_sec == 120:
            raise SystemExit(f'{name}: its small files could not be written; see --reader={name} --input=0')
        if rest:
            yield rest.pop(0), 'hangs', f'no answer for {LIMIT_SEC} s, or a crash (status {status})'
        numbers = rest


def show(values, wide=18):
    return f'{values[0]:{wide}}' + ''.join(f'{value:>13}' for value in values[1:])


def fuzz(n, readers, log):
    """-> {reader: {column: how many}}, printed as a table. log: an open file, for what is a fault"""
    import fuzz_seeds
    readers = readers or list(fuzz_seeds.READERS)
    shares = sum(fuzz_seeds.READERS[name].share for name in readers)
    table, examples = {}, []
    print(show(['reader', *COLUMNS]))
    with tempfile.TemporaryDirectory() as top:
        fuzz_seeds.write_codec(Path(top) / 'codec')
        for name in readers:
            counts = dict.fromkeys(COLUMNS, 0)
            numbers = list(range(max(1, -int(-n * fuzz_seeds.READERS[name].share // shares))))
            for number, column, said in listen(name, numbers, Path(top)):
                counts['inputs'] += 1
                counts[column] += 1
                if column not in ('refused', 'skipped', 'accepted'):
                    examples.append((name, number, column, said))
            table[name] = counts
            print(show([name, *counts.values()]), flush=True)
    print(show(['all', *(sum(counts[column] for counts in table.values()) for column in COLUMNS)]))
    for name, number, column, said in examples:
        log.write(f'\n--reader={name} --input={number}: {column}\n{said}\n')
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=10000, help='inputs in all (10000)')
    parser.add_argument('--reader', action='append', help='this one only; may be given several times')
    parser.add_argument('--input', type=int, help='the number of one input, which is tried here')
    args = parser.parse_args()
    if args.input is not None:
        with tempfile.TemporaryDirectory() as top:
            import fuzz_seeds
            fuzz_seeds.write_codec(Path(top) / 'codec')
            work(args.reader[0], [args.input], Path(top), sys.stdout)
        return
    began = time.time()
    table = fuzz(args.n, args.reader, sys.stderr)
    print(f'{time.time() - began:.0f} s')
    faults = COLUMNS[COLUMNS.index('tracebacks'):]
    if any(counts[column] for counts in table.values() for column in faults):
        raise SystemExit('not all of it ended in a sentence or was counted; see above')


if __name__ == '__main__':
    main()
