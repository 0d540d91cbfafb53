"""
CosyVoice as a program for Worker (worker.py): codes become audio, text becomes audio. It runs in the Python
environment of a CosyVoice checkout. nanoduplex needs nothing of that environment, and this file needs nothing
of nanoduplex.

    nanoduplex ─ stdin: a line of JSON ─► this ─ CosyVoice ─► a wav, and on stdout a line of JSON

    git clone --recursive https://github.com/FunAudioLLM/CosyVoice /src/CosyVoice     # then see its README
    python -m codec s3 --checkpoint=/models/CosyVoice-300M-25Hz/speech_tokenizer_v1.onnx --out=codecs/s3 \\
        --vocoder='/envs/cosyvoice/bin/python codec/cosyvoice_worker.py --checkout=/src/CosyVoice
                   --model=/models/CosyVoice-300M-25Hz --voice=anna.wav'

    it says  {"ready": true}
    we say   {"codes": [230, 440], "out": "a.wav"}                      flow matching and HiFi-GAN alone
    we say   {"text": "Hello.", "voice": "anna.wav", "out": "a.wav"}    its language model, too
    it says  {"ok": true, "sample_rate": 22050, "n_sample": 22016}  or  {"error": "…"}

Codes that come bit by bit are a session, of any name; many can be open. Each answer's wav is what CosyVoice's
own streaming has made by then of what came before, which may be nothing; after "last" it is all the rest:

    we say   {"session": "7f", "codes": [230, 440], "last": false, "out": "a.wav"}
    we say   {"session": "7f", "codes": [], "last": true, "out": "b.wav"}

CosyVoice 1 decodes --hop codes at once, with 20 that it knows already and 20 to come, and cross-fades; v2 and
v3 decode 25, and look 3 ahead. v2's code at 9ebcf7b refuses to stream unless it is built to do nothing else.

A voice is a wav of up to 30 s with its words in a .txt beside it (for CosyVoice 3 after "You are a helpful
assistant.<|endofprompt|>"), or a speaker of the model's spk2info.pt. The codes have to be those of the model:
25 Hz and 50 Hz differ, and so do v1 and v2. Each request begins with the same random state, or with that of
its "seed".

Written for CosyVoice's code of December 2025 (cosyvoice/cli: cosyvoice.py with AutoModel, frontend.py at
7538c6a, model.py at 9ebcf7b, where vc_job, a thread, supplies the codes of a stream). It has NEVER RUN WITH
CosyVoice's WEIGHTS, which were not at hand: tests/test_s3.py runs it with a package that only has the same
methods, so how its streams sound, and how late, is not known.
"""
import argparse
import json
import os
import queue
import sys
import threading


def know(cosyvoice, voice):
    """What the model knows of a voice; a wav is listened to once."""
    if voice not in cosyvoice.frontend.spk2info:
        if not os.path.isfile(voice):
            speakers = ', '.join(cosyvoice.list_available_spks()) or 'none'
            raise ValueError(f'no voice {voice!r}: it is neither a wav nor one of {speakers}')
        with open(os.path.splitext(voice)[0] + '.txt', encoding='utf-8') as f:
            cosyvoice.add_zero_shot_spk(f.read().strip(), voice, voice)
    return cosyvoice.frontend.spk2info[voice]


def speak(cosyvoice, request, voice, stream=False):
    """-> the parts of a wave, as inference_vc and inference_zero_shot yield them. With stream, the request's
    codes are a Session's token."""
    import torch
    torch.manual_seed(request.get('seed', 0))
    known = know(cosyvoice, voice)
    if 'text' in request:
        if 'embedding' in known:        # a speaker, not a prompt
            return cosyvoice.inference_sft(request['text'], voice)
        return cosyvoice.inference_zero_shot(request['text'], '', '', zero_shot_spk_id=voice)
    if 'embedding' in known:
        prompt = {'flow_embedding': known['embedding']}
    else:
        keys = ('flow_embedding', 'flow_prompt_speech_token', 'prompt_speech_feat')
        prompt = {key: known[key] for key in keys}
    # source_speech_token takes the language model's place, as in voice conversion
    codes = request['codes'] if stream else torch.tensor([request['codes']], dtype=torch.int32)
    return cosyvoice.model.tts(source_speech_token=codes, stream=stream, **prompt)


class Session:
    """One turn: CosyVoice waits for codes in a thread and speaks in another."""

    def __init__(self, cosyvoice, request, voice):
        import torch
        self.codes, self.waves, self.error = queue.Queue(), queue.Queue(), None
        self.cosyvoice, self.request, self.voice = cosyvoice, request, voice
        # vc_job is handed this tensor, and knows by it whose codes it is to supply
        self.token = torch.zeros(1, 1, dtype=torch.int32)
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        try:
            request = self.request | {'codes': self.token}
            for part in speak(self.cosyvoice, request, self.voice, stream=True):
                self.waves.put(part['tts_speech'][0].cpu())
        except Exception as error:      # it has to be said by the thread that answers
            self.error = error
            self.codes.put(None)        # CosyVoice's thread may still wait for more

    def take(self, is_last):
        """-> what was made since: a wave, perhaps of no samples"""
        import torch
        if is_last:
            self.thread.join()
        if self.error:
            raise self.error
        return torch.cat([torch.zeros(0), *(self.waves.get() for _ in range(self.waves.qsize()))])


def supply(model, sessions):
    """Puts vc_job, by which CosyVoice gets codes without its language model, before a session's queue."""
    whole = model.vc_job

    def vc_job(token, uuid):
        session = next((each for each in list(sessions.values()) if each.token is token), None)
        if session is None:
            return whole(token, uuid)
        for codes in iter(session.codes.get, None):
            model.tts_speech_token_dict[uuid].extend(codes)
        model.llm_end_dict[uuid] = True
    model.vc_job = vc_job


def take_part(cosyvoice, sessions, request, voice):
    """A session's request -> a wave"""
    name, is_last = request['session'], request['last']
    if name not in sessions:
        sessions[name] = Session(cosyvoice, request, voice)
        sessions[name].thread.start()
    session = sessions[name]
    session.codes.put(request['codes'])
    if is_last:
        session.codes.put(None)
    try:
        return session.take(is_last)
    finally:
        if is_last or session.error:
            del sessions[name]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, help='folder of the weights')
    parser.add_argument('--checkout', required=True, help='folder of the source')
    parser.add_argument('--voice', help='of requests that name none')
    parser.add_argument('--hop', type=int, default=10,
                        help='codes of a session that CosyVoice 1 decodes at once; its own 2 s sound '
                             'better and come later')
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), 'w', encoding='utf-8')
    os.dup2(2, 1)       # what CosyVoice and all below it print goes to stderr: the protocol stays clean
    sys.path[:0] = [args.checkout, os.path.join(args.checkout, 'third_party', 'Matcha-TTS')]
    import soundfile
    import torch
    from cosyvoice.cli.cosyvoice import AutoModel
    from cosyvoice.utils.file_utils import load_wav
    cosyvoice = AutoModel(model_dir=args.model)

    def speech_feat(wav):
        # CosyVoice's own reads every prompt at 24 kHz (December 2025), which the 300M models, of 22.05 kHz,
        # take for a voice 8 % lower
        feat = cosyvoice.frontend.feat_extractor(load_wav(wav, cosyvoice.sample_rate))
        feat = feat.squeeze(0).transpose(0, 1)[None].to(cosyvoice.frontend.device)
        return feat, torch.tensor([feat.shape[1]], dtype=torch.int32, device=feat.device)
    cosyvoice.frontend._extract_speech_feat = speech_feat
    sessions = {}
    supply(cosyvoice.model, sessions)
    if hasattr(cosyvoice.model, 'token_min_hop_len'):       # CosyVoice 1
        cosyvoice.model.token_min_hop_len = args.hop

    print(json.dumps({'ready': True}), file=out, flush=True)
    for line in sys.stdin:
        try:
            request = json.loads(line)
            voice = request.get('voice') or args.voice or ''
            if 'session' in request:
                wave = take_part(cosyvoice, sessions, request, voice)
            else:
                parts = speak(cosyvoice, request, voice)
                wave = torch.cat([part['tts_speech'] for part in parts], 1)[0].cpu()
            soundfile.write(request['out'], wave.numpy(), cosyvoice.sample_rate)
            answer = {'ok': True, 'sample_rate': cosyvoice.sample_rate, 'n_sample': len(wave)}
        except (ValueError, KeyError, OSError, AssertionError, RuntimeError) as error:     # the next may work
            answer = {'error': f'{type(error).__name__}: {error}'.replace('\n', ' ')}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == '__main__':
    main()
