"""
    echo '"The capital of France"' | python -m codec text FOLDER          # Qwen2: [785, 6722, 315, 9625]
    python -m codec encode question.wav --codec=data/demo > codes.json    # [17, 17, 203, …], 25 a second
    python -m codec decode codes.json --codec=data/demo --out=back.wav
    python -m codec stream question.wav --codec=data/demo                 # as if live: what differs, how late
    python -m codec s3 --checkpoint=speech_tokenizer_v1.onnx --out=codecs/s3      # of CosyVoice-300M-25Hz
    python -m codec snac --checkpoint=snac_24khz --out=codecs/snac                # likewise mimi, dac
"""
import json
import re
import signal
import sys
import time

import numpy as np

from codec import load_codec
from common.audio import read_audio, write_audio
from common.levels import codes_per_frame, is_silent
from config import Parser
from vocabulary import Vocabulary


def read_texts(file):
    for n, line in enumerate(file, 1):          # bytes: JSON is UTF-8 whatever the terminal's locale
        try:
            string = json.loads(line)
        except (ValueError, RecursionError):    # RecursionError: a line of 100,000 brackets
            string = None
        if not isinstance(string, str):
            raise ValueError(f'line {n} of standard input is no JSON string such as "hello"')
        yield string


def read_codes(path, codec):
    """-> [code a frame], or of several codebooks [[codes of a frame]]"""
    n_code = codes_per_frame(codec.describe())
    try:
        with sys.stdin if path == '-' else open(path) as file:
            codes = json.load(file)
    except OSError as error:
        raise ValueError(f'{path}: {error.strerror}')
    except ValueError as error:
        raise ValueError(f'{path} is no JSON list of codes ({error})')
    frames = [frame if n_code > 1 else [frame] for frame in codes] if isinstance(codes, list) else []
    is_frame = [isinstance(frame, list) and len(frame) == n_code and all(type(code) is int for code in frame)
                for frame in frames]
    if not frames or not all(is_frame):
        raise ValueError(f'{path} is no JSON list of ' + (f'frames of {n_code} ' * (n_code > 1) + 'codes'))
    for at, frame in enumerate(frames):
        for code in frame:
            if not 0 <= code < codec.n_codes:
                raise ValueError(f'{path}: code {code} at frame {at} is out of range, '
                                 f'the codec has 0 to {codec.n_codes - 1}')
    return codes


def read_frames(text, codec):
    if not getattr(codec, 'stream_frames', None):
        raise ValueError(f'--frames: {codec.name} does not stream in windows')
    if not re.fullmatch(r'\d+,\d+,[1-9]\d*', text):
        raise ValueError(f'--frames={text} is not three numbers such as 250,5,2, the last at least 1')
    return tuple(map(int, text.split(',')))


def in_pieces(live, rows, n):
    """Pushes n rows at a time -> what comes out, how many seconds each push took"""
    parts, secs = [], []
    for at in range(0, len(rows) + 1, n):
        start = time.perf_counter()
        parts.append(live.push(rows[at:at + n]))
        secs.append(time.perf_counter() - start)
    start = time.perf_counter()
    parts.append(live.finish())
    return np.concatenate(parts), [*secs, time.perf_counter() - start]


def compare(codec, wave):
    """Live audio, by 20 ms in and by 80 ms out, against encode and decode of the whole -> lines to print"""
    n_sec, stream = len(wave) / codec.sample_rate, codec.stream()
    live, secs = in_pieces(stream, wave, codec.sample_rate // 50)
    whole = codec.encode(wave)
    same = (live == whole).reshape(len(whole), -1)
    silent = is_silent(live, codec.silence_codes) & is_silent(whole, codec.silence_codes)
    yield (f'codes      {same.mean():.1%} of {same.size} are those of the whole, '
           f'{(same | silent[:, None]).mean():.1%} if all that stand for silence are one')
    differ = np.flatnonzero(~(same.all(1) | silent)) / codec.rate_hz
    if len(differ):
        yield f'           half of the others lie before {np.median(differ):.1f} s'
    yield (f'encoding   codes are sure {stream.lookahead_sec * 1000:.0f} ms after their frame; '
           f'{sum(secs) / n_sec:.3f} s a second, at most {max(secs) * 1000:.0f} ms at once')
    heard, secs = in_pieces(codec.speak(), live, max(1, round(0.08 * codec.rate_hz)))
    yield f'decoding   {sum(secs) / n_sec:.3f} s a second, at most {max(secs) * 1000:.0f} ms at once'
    all_at_once = codec.decode(live)
    yield (f'seams      {np.abs(heard - all_at_once).max():.0e} is the largest difference from decoding the '
           f'whole, whose peak is {np.abs(all_at_once).max():.2f}')


def main():
    parser = Parser(prog='python -m codec', description='text and speech to integers, and back')
    commands = parser.add_subparsers(dest='command', required=True)
    text = commands.add_parser('text', help='a JSON string per line of standard input -> a JSON list of ids')
    text.add_argument('folder', help='tokenizer folder: tokenizer.json, or vocab.json and merges.txt')
    encode = commands.add_parser('encode', help='an audio file -> a JSON list of codes on standard output')
    stream = commands.add_parser('stream', help='an audio file as if live: agreement, look-ahead, speed')
    for command in (encode, stream):
        command.add_argument('path', help='wav, flac, ogg, mp3, …, of any rate')
        command.add_argument('--channel', type=int,
                             help='which channel, from 0; needed where there are several')
    stream.add_argument('--frames', help='frames read before a block and after it, and frames of a block, as '
                                         "250,5,2: to try others with CosyVoice's, SNAC and DAC")
    s3 = commands.add_parser('s3', help="a codec folder for CosyVoice's speech tokens")
    s3.add_argument('--out', required=True, help='the folder to write')
    s3.add_argument('--checkpoint',
                    help='its speech_tokenizer_v*.onnx; without it the folder only describes '
                         'codes that were made elsewhere')
    s3.add_argument('--variant',
                    help='v1_25hz, v1_50hz, v2_25hz or v3_25hz: needed without a checkpoint, '
                         'or with one that was not published')
    s3.add_argument('--sha256', help='of a checkpoint that was not published: you mean this very file')
    s3.add_argument('--silence_codes', default='',
                    help='as 230,440,491: more of them, the first one where no checkpoint can be asked')
    s3.add_argument('--vocoder', default='',
                    help='command of a program that turns codes into audio: codec/cosyvoice_worker.py')
    for name, used in (('snac', 'all'), ('mimi', '8, as Moshi'), ('dac', '2, as OuteTTS')):
        rvq = commands.add_parser(name, help=f'a codec folder for {name.upper()}, of several codebooks')
        rvq.add_argument('--out', required=True, help='the folder to write')
        rvq.add_argument('--checkpoint', required=True, help='a folder with its config.json and weights')
        rvq.add_argument('--codebooks', type=int, help=f'how many of them, the coarsest first ({used})')
    decode = commands.add_parser('decode', help='a JSON list of codes -> a wav')
    decode.add_argument('path', help='a file with the list, - for standard input')
    decode.add_argument('--out', required=True, help='the wav to write')
    for command in (encode, stream, decode):
        command.add_argument('--codec', required=True,
                             help='folder with codec.json: data/demo/codec, a data folder, a checkpoint')
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # python -m codec … | head

    if args.command == 'text':
        vocab = Vocabulary.load(args.folder)
        for string in read_texts(sys.stdin.buffer):
            print(json.dumps(vocab.encode(string)), flush=True)
        return
    if args.command == 's3':
        from codec.s3 import S3Codec
        if not re.fullmatch(r'(\d+(,\d+)*)?', args.silence_codes):
            raise ValueError(f'--silence_codes={args.silence_codes} is no list such as 230,440,491')
        silence_codes = [int(code) for code in args.silence_codes.split(',') if code]
        codec = S3Codec.create(args.checkpoint, args.variant, args.sha256, silence_codes, args.vocoder)
        codec.save(args.out)
        return print(f'{args.out}: {codec.variant} {codec.fingerprint}, '
                     f'{len(codec.silence_codes)} codes of silence, {codec.silence_codes[0]} first')
    if args.command in ('snac', 'mimi', 'dac'):
        from codec import rvq
        codec = getattr(rvq, args.command.capitalize()).create(args.checkpoint, args.codebooks)
        codec.save(args.out)
        return print(f'{args.out}: {args.command} {codec.fingerprint}, {codec.rate_hz:g} frames a second of '
                     f'{codec.codes_per_frame} codes, levels {codec.levels}')
    codec = load_codec(args.codec)
    if args.command == 'encode':
        print(json.dumps(codec.encode(read_audio(args.path, codec.sample_rate, args.channel)).tolist()))
    elif args.command == 'stream':
        if args.frames:
            codec.stream_frames = read_frames(args.frames, codec)
        for line in compare(codec, read_audio(args.path, codec.sample_rate, args.channel)):
            print(line, flush=True)
    else:
        write_audio(args.out, codec.decode(np.array(read_codes(args.path, codec))), codec.sample_rate)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
