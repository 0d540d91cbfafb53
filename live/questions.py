"""
A user's recording of minutes, made of recordings of one question each: some come while the answer to the one
before is still spoken.

    python -m live.questions out/talk/questions/*.wav --sec=600 --out=out/talk/user.wav
"""
import argparse

import numpy as np

from common.audio import read_audio, write_audio

RATE_HZ = 16000
# of the silence between two recordings, which themselves have half a second before the question and after it
ANSWER_SEC = 2.5, 3.5       # the answer is heard to its end
INTERRUPT_SEC = 0.3, 0.9    # the next question begins 1.3 to 1.9 s after the end of the one before
INTERRUPT_SHARE = 0.25


def string(waves, sec, rng):
    """waves: float32 at RATE_HZ, in turn as often as they fit -> float32 [sec * RATE_HZ]"""
    whole, at, i = np.zeros(round(sec * RATE_HZ), np.float32), 0, 0
    while at + len(waves[i % len(waves)]) + ANSWER_SEC[1] * RATE_HZ < len(whole):
        wave = waves[i % len(waves)]
        whole[at:at + len(wave)] = wave
        gap_sec = rng.uniform(*(INTERRUPT_SEC if rng.random() < INTERRUPT_SHARE else ANSWER_SEC))
        at, i = at + len(wave) + round(gap_sec * RATE_HZ), i + 1
    if not i:
        raise ValueError(f'{sec} s hold no question and its answer')
    return whole


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', help='recordings')
    parser.add_argument('--sec', type=float, default=600.0, help='length of the whole')
    parser.add_argument('--out', required=True, help='a wav')
    args = parser.parse_args()
    waves = [read_audio(path, RATE_HZ) for path in args.files]
    write_audio(args.out, string(waves, args.sec, np.random.default_rng(1)), RATE_HZ)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
