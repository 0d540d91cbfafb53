"""
The world to integers and back. Vocabulary gives text, control tokens and speech codes one id space:

    0 .. n_text - 1       byte-level BPE                                  Qwen2: 0 .. 151,642
    n_text ..             the folder's own specials, then CONTROL         Qwen2: 151,643 .. 151,653
    ..                    spare rows, if the folder's model has some      Qwen2: .. 151,935
    code_start ..         n_codes speech codes                            CosyVoice: 151,936 .. 156,031
    .. size - 1           padding to a multiple of 128                    none: 156,032 = 128 * 1,219

and a speech codec turns a wave into codes and back: CosyVoice's (data/cosyvoice/s3.py), or the one that the demo learns for itself
(data/demo/mel.py). Anything with the same name, rate_hz, sample_rate, n_codes, fingerprint, silence_codes, about, encode,
encode_many, decode, save and load will do, and a line in CODECS.

    echo '"The capital of France"' | python codec.py text FOLDER          # Qwen2: [785, 6722, 315, 9625]
    python codec.py encode question.wav --codec=data/demo/codec           # [17, 17, 203, …], 25 a second
    python codec.py encode question.wav --codec=data/demo/codec | python codec.py decode - --codec=data/demo/codec --out=back.wav
    python codec.py s3 --checkpoint=speech_tokenizer_v1.onnx --out=codecs/s3             # of CosyVoice-300M-25Hz; then --codec=codecs/s3
"""
import importlib
import json
import os
import re
import signal
import sys
import unicodedata
from itertools import count, zip_longest
from pathlib import Path

import numpy as np
import tiktoken
from safetensors import SafetensorError

from flatten import CONTROL, Parser

# how Qwen2 cuts text into pieces before BPE: tokenizer.json says it, vocab.json and merges.txt do not
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# GPT-2 spells each byte of a token as a visible character: its own if it has one, else one from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
INVISIBLE = sorted(set(range(256)) - set(VISIBLE))
BYTE_OF_CHAR = dict(zip(VISIBLE + list(range(256, 324)), VISIBLE + INVISIBLE, strict=True))


class Vocabulary:
    """vocab = Vocabulary.load(folder), then vocab.encode(text), vocab.control[name], vocab.code_start + code"""

    def __init__(self, tokens, merges, pattern, added, settings, n_row, code_start, n_codes):
        self.tokens, self.merges, self.pattern, self.settings = tokens, merges, pattern, settings
        ranks = {token.translate(BYTE_OF_CHAR).encode('latin-1'): i for i, token in enumerate(tokens)}
        self.bpe = tiktoken.Encoding('bpe', pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.n_text = len(tokens)

        # save() names every row: the codes stay where they are named, spare rows are as free as they were
        named = {entry['content']: entry['id'] for entry in added}
        if code_start is None and '<|s_0|>' in named:
            code_start = named['<|s_0|>']
            n_codes = next(n for n in count() if named.get(f'<|s_{n}|>') != code_start + n)
        is_ours = re.compile(r'<\|(s|reserved)_\d+\|>').fullmatch
        self.added = [entry for entry in added if not is_ours(entry['content'])]
        free = count(max([self.n_text - 1] + [entry['id'] for entry in self.added]) + 1)
        self.control = {name: named[name] if name in named else next(free) for name in CONTROL}
        self.untrained = [i for name, i in self.control.items() if name not in named]      # spare rows that now mean something
        first = next(free)
        if code_start is None:
            code_start = max(first, n_row)
        if code_start < first:
            raise ValueError(f'speech codes start at {code_start}, but special tokens go up to {first - 1}')
        self.code_start, self.n_codes = code_start, n_codes
        self.size = -(-(code_start + n_codes) // 128) * 128 # GPUs like multiples of 128

    @classmethod
    def load(cls, folder, n_codes=0):
        """
        Reads tokenizer.json, or vocab.json and merges.txt. Codes start at the vocab_size of the folder's
        config.json, if any: the rows of its model are left alone. A folder that has codes already (a checkpoint
        of ours) says itself where and how many, and n_codes is ignored.
        """
        folder = Path(folder)
        missing = [name for name in ('vocab.json', 'merges.txt') if not (folder / name).is_file()]
        try:
            config, settings = (read_json(folder / name) if (folder / name).is_file() else {}
                                for name in ('config.json', 'tokenizer_config.json'))
            if (folder / 'tokenizer.json').is_file():
                vocab, merges, pattern, added = parse_tokenizer(read_json(folder / 'tokenizer.json'))
            elif not missing:
                vocab, pattern = read_json(folder / 'vocab.json'), QWEN2_PATTERN
                lines = (folder / 'merges.txt').read_text(encoding='utf-8').split('\n')
                merges = [tuple(line.split(' ')) for line in lines if line and not line.startswith('#version')]
                added = settings.get('added_tokens_decoder', {})
                added = [{'id': int(i), **entry} for i, entry in added.items()]
            else:
                raise ValueError(f'no tokenizer here: neither tokenizer.json nor {" and ".join(missing)} found')
            added_ids = {entry['id'] for entry in added} # GPT-2 and others list theirs among the text tokens
            tokens = in_merge_order({token: i for token, i in vocab.items() if i not in added_ids}, merges)
            ours = config.get('nanoduplex') or {}
            return cls(tokens, merges, pattern, added, settings, config.get('vocab_size') or 0,
                       ours.get('code_start'), ours.get('n_codes', n_codes))
        except ValueError as error:
            raise ValueError(f'{folder}: {error}') from None

    def encode(self, text):
        """
        Text is NFC-normalised, as Qwen2's was. Names of special tokens stay text: a user who types <|eot|> does
        not end a turn. Half a surrogate pair, which JSON can smuggle in, becomes U+FFFD.
        """
        return self.bpe.encode_ordinary(unicodedata.normalize('NFC', text))

    def decode(self, ids):
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.n_text:
                raise ValueError(f'id {i} is no text; text has ids 0 to {self.n_text - 1}')
        return self.bpe.decode(ids, errors='replace') # a character may be cut between two chunks

    def save(self, folder):
        """
        Writes tokenizer.json, tokenizer_config.json, vocab.json and merges.txt: transformers 4 and 5, vLLM and
        llama.cpp each find what they read. All ids below size get a name, as one without crashes vLLM's server.
        """
        entries = {entry['id']: entry for entry in self.added}
        names = {i: name for name, i in self.control.items()}
        names |= {self.code_start + code: f'<|s_{code}|>' for code in range(self.n_codes)}
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for i in range(self.n_text, self.size):
            entries.setdefault(i, {'id': i, 'content': names.get(i, f'<|reserved_{i}|>'), **flags})
        entries = [entries[i] for i in sorted(entries)]

        vocab = {token: i for i, token in enumerate(self.tokens)}
        merges = [f'{a} {b}' for a, b in self.merges] # as strings: old versions of tokenizers read no pairs
        byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=False, use_regex=False)
        split = {'type': 'Split', 'pattern': {'Regex': self.pattern}, 'behavior': 'Isolated', 'invert': False}
        tokenizer = {
            'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': entries,
            'normalizer': {'type': 'NFC'},
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, byte_level]},
            'post_processor': byte_level, 'decoder': byte_level,
            'model': {
                'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '',
                'end_of_word_suffix': '', 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
                'vocab': vocab, 'merges': merges,
            },
        }
        # without a None, Qwen2Tokenizer would add its <|endoftext|> after our last id
        settings = dict.fromkeys(('bos_token', 'eos_token', 'pad_token', 'unk_token')) | self.settings
        extra = settings.pop('extra_special_tokens', []) # transformers 5 writes a list here, which 4 cannot read
        special = [*settings.get('additional_special_tokens', []), *extra, *CONTROL]
        settings |= {
            'tokenizer_class': 'Qwen2Tokenizer' if self.pattern == QWEN2_PATTERN else 'PreTrainedTokenizerFast',
            'additional_special_tokens': list(dict.fromkeys(special)),
            'added_tokens_decoder': {
                str(entry['id']): {k: v for k, v in entry.items() if k != 'id'} for entry in entries},
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {'tokenizer.json': tokenizer, 'tokenizer_config.json': settings, 'vocab.json': vocab}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')
        (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(merges) + '\n', encoding='utf-8')


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error: # among them broken UTF-8
        raise ValueError(f'{path.name} is no JSON ({error})') from None
    if not isinstance(content, dict):
        raise ValueError(f'{path.name} holds no JSON object')
    return content


def parse_tokenizer(tokenizer):
    """The content of a tokenizer.json -> vocab, merges, pattern, added tokens."""
    model, normalizer = tokenizer.get('model', {}), tokenizer.get('normalizer')
    pre = tokenizer.get('pre_tokenizer') or {}
    if model.get('type') != 'BPE':
        raise ValueError(f'tokenizer.json has a model of type {model.get("type")}; only BPE is known here')
    if normalizer not in (None, {'type': 'NFC'}): # None: we do NFC all the same, and save() says so
        raise ValueError(f'tokenizer.json normalises text by {normalizer}; only NFC is known here')
    match pre.get('pretokenizers'):
        case [{'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False},
              {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': False}]:
            merges = [tuple(pair.split(' ') if isinstance(pair, str) else pair) for pair in model['merges']]
            return model['vocab'], merges, pattern, tokenizer.get('added_tokens', [])
    raise ValueError(f'tokenizer.json has the pre-tokenizer {pre}; known here is only that of Qwen2, '
                     'an isolating Split by a Regex followed by ByteLevel without one')


def in_merge_order(vocab, merges):
    """The tokens by id, checked: tiktoken takes no merges, it always joins what gives the lowest id."""
    tokens = sorted(vocab, key=vocab.get)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError('text ids are not 0, 1, 2 ..; train the BPE without special tokens, add them afterwards')
    if sorted(token.translate(BYTE_OF_CHAR) for token in tokens[:256]) != [chr(byte) for byte in range(256)]:
        raise ValueError('ids 0 to 255 are not the 256 bytes; train with initial_alphabet=ByteLevel.alphabet()')
    made = tokens[:256] + list(dict.fromkeys(a + b for a, b in merges))
    for i, (token, by_merges) in enumerate(zip_longest(tokens, made)):
        if token != by_merges:
            raise ValueError(f'id {i} is {token!r}, but {by_merges!r} by the merges; ids have to follow these')
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# audio files

def read_audio(path, sample_rate, channel=None):
    """-> float32 [n_sample], one channel at sample_rate. Raises ValueError for what cannot be listened to."""
    import soundfile  # pip install soundfile soxr: only those who touch audio need them
    import soxr
    if not os.path.isfile(path):
        raise ValueError(f'no file {path}')
    try:
        wave, rate = soundfile.read(path, dtype='float32', always_2d=True)     # (n_sample, n_channel)
    except (soundfile.SoundFileError, TypeError) as error:     # TypeError: a .raw file, whose rate nobody knows
        raise ValueError(f'{path} is not audio that can be read ({error})') from None
    n_sample, n_channel = wave.shape
    if channel is None and n_channel > 1:
        raise ValueError(f'{path} has {n_channel} channels: say which is the user\'s, 0 to {n_channel - 1}, with --user_channel '
                         '(sample.py) or --channel (codec.py)')
    if not 0 <= (channel or 0) < n_channel:
        raise ValueError(f'{path} has {n_channel} channels, 0 to {n_channel - 1}; there is no channel {channel}')
    if n_sample == 0:
        raise ValueError(f'{path} has no samples')
    wave = wave[:, channel or 0]
    if not np.isfinite(wave).all():
        at = int(np.argmin(np.isfinite(wave)))
        raise ValueError(f'{path}: sample {at}, at {at / rate:.3f} s, is {wave[at]}; a file of numbers is needed')
    return soxr.resample(wave, rate, sample_rate) if rate != sample_rate else wave


def write_audio(path, wave, sample_rate):
    """float32 [n_sample] or [n_sample, n_channel] -> a wav of 16 bits, which appears whole or not at all."""
    import soundfile
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or '.'):
        raise ValueError(f'cannot write {path}: ' + ('it is a folder' if os.path.isdir(path) else 'its folder does not exist'))
    soundfile.write(path + '.part', np.clip(wave, -1, 1), sample_rate, format='WAV', subtype='PCM_16')
    os.replace(path + '.part', path)


# ---------------------------------------------------------------------------------------------------------------------

CODECS = {'mel': 'data.demo.mel.MelCodec', 's3': 'data.cosyvoice.s3.S3Codec'}     # imported when they are needed


def load_codec(folder):
    """The codec that was saved in a folder, or in codec/ of a data folder or checkpoint. Raises ValueError if there is none."""
    for place in (folder, os.path.join(folder, 'codec')):
        path = os.path.join(place, 'codec.json')
        if os.path.isfile(path):
            name = read_json(Path(path)).get('name')
            if name not in CODECS:
                raise ValueError(f'{path} is of codec {name!r}; known are {", ".join(CODECS)}')
            try:
                module, _, kind = CODECS[name].rpartition('.')
                return getattr(importlib.import_module(module), kind).load(place)
            except (OSError, KeyError, SafetensorError) as error:
                raise ValueError(f'{place} holds no complete codec ({error}); prepare the data again')
    raise ValueError(f'no codec in {folder}: it has no codec.json, nor has {os.path.join(folder, "codec")}')


def read_texts(file):
    for n, line in enumerate(file, 1): # bytes: JSON is UTF-8 whatever the terminal's locale
        try:
            string = json.loads(line)
        except (ValueError, RecursionError): # RecursionError: a line of 100,000 brackets
            string = None
        if not isinstance(string, str):
            raise ValueError(f'line {n} of standard input is no JSON string such as "hello"')
        yield string


def read_codes(path, n_codes):
    try:
        with sys.stdin if path == '-' else open(path) as file:
            codes = json.load(file)
    except OSError as error:
        raise ValueError(f'{path}: {error.strerror}')
    except ValueError as error:
        raise ValueError(f'{path} is no JSON list of codes ({error})')
    if not isinstance(codes, list) or not codes or not all(type(code) is int for code in codes):
        raise ValueError(f'{path} is no JSON list of codes')
    for frame, code in enumerate(codes):
        if not 0 <= code < n_codes:
            raise ValueError(f'{path}: code {code} at frame {frame} is out of range, the codec has 0 to {n_codes - 1}')
    return codes


def main():
    parser = Parser(description='the world to integers and back')
    commands = parser.add_subparsers(dest='command', required=True)
    text = commands.add_parser('text', help='a JSON string per line of standard input -> a JSON list of ids')
    text.add_argument('folder', help='tokenizer folder: tokenizer.json, or vocab.json and merges.txt')
    encode = commands.add_parser('encode', help='an audio file -> a JSON list of codes on standard output')
    encode.add_argument('path', help='wav, flac, ogg, mp3, …, of any rate')
    encode.add_argument('--channel', type=int, help='which channel, from 0; needed where there are several')
    s3 = commands.add_parser('s3', help="a codec folder for CosyVoice's speech tokens")
    s3.add_argument('--out', required=True, help='the folder to write')
    s3.add_argument('--checkpoint', help='its speech_tokenizer_v*.onnx; without it the folder only describes codes that were made elsewhere')
    s3.add_argument('--variant', help='v1_25hz, v1_50hz, v2_25hz or v3_25hz: needed without a checkpoint, or with one that was not published')
    s3.add_argument('--sha256', help='of a checkpoint that was not published: you mean this very file')
    s3.add_argument('--silence_codes', default='', help='as 230,440,491: more of them, the first one where no checkpoint can be asked')
    s3.add_argument('--vocoder', default='', help='command of a program that turns codes into audio: data/cosyvoice/worker.py')
    decode = commands.add_parser('decode', help='a JSON list of codes -> a wav')
    decode.add_argument('path', help='a file with the list, - for standard input')
    decode.add_argument('--out', required=True, help='the wav to write')
    for command in (encode, decode):
        command.add_argument('--codec', required=True, help='folder with codec.json: data/demo/codec, a data folder, a checkpoint')
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # python codec.py … | head

    if args.command == 'text':
        vocab = Vocabulary.load(args.folder)
        for string in read_texts(sys.stdin.buffer):
            print(json.dumps(vocab.encode(string)), flush=True)
        return
    if args.command == 's3':
        from data.cosyvoice.s3 import S3Codec
        if not re.fullmatch(r'(\d+(,\d+)*)?', args.silence_codes):
            raise ValueError(f'--silence_codes={args.silence_codes} is no list such as 230,440,491')
        codec = S3Codec.create(args.checkpoint, args.variant, args.sha256, [int(code) for code in args.silence_codes.split(',') if code], args.vocoder)
        codec.save(args.out)
        return print(f'{args.out}: {codec.variant} {codec.fingerprint}, {len(codec.silence_codes)} codes of silence, {codec.silence_codes[0]} first')
    codec = load_codec(args.codec)
    if args.command == 'encode':
        print(json.dumps(codec.encode(read_audio(args.path, codec.sample_rate, args.channel)).tolist()))
    else:
        write_audio(args.out, codec.decode(np.array(read_codes(args.path, codec.n_codes))), codec.sample_rate)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
