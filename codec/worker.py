"""Talks to a program that decodes or speaks in a Python environment of its own (cosyvoice_worker.py)."""
import json
import os
import select
import shlex
import subprocess
import tempfile
import threading


class Worker:
    """
    A program that is asked and answers in lines of JSON, with audio in files:

        it says  {"ready": true}
        we say   {"codes": [230, 440], "out": "a.wav"}
        or       {"text": "Hello.", "voice": "anna", "out": "a.wav"}
        or       {"session": "7f", "codes": [230], "last": false, "out": "a.wav"}     cosyvoice_worker.py
        it says  {"ok": true}  or  {"error": "no voice anna"}
    """
    answer_sec = 600        # a program that hangs is ended, lest training wait for it until it is ended, too

    def __init__(self, command):
        self.command, self.lock = command, threading.Lock()
        # for its stderr; a pipe that nobody reads would fill up and stop the program
        self.log = tempfile.TemporaryFile()
        env, visible = dict(os.environ), os.environ.get('CUDA_VISIBLE_DEVICES', 'all').split(',')
        # under torchrun each program has the GPU of the process that asks it, not all of them the first GPU
        if 'LOCAL_RANK' in env and visible != ['']:
            gpu = env['LOCAL_RANK'] if visible == ['all'] else visible[int(env['LOCAL_RANK']) % len(visible)]
            env['CUDA_VISIBLE_DEVICES'] = gpu
        try:
            self.process = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=self.log, bufsize=0, env=env)
        except (OSError, ValueError) as error:
            raise ValueError(f'cannot start {command!r}: {error}') from None
        self.listen()

    def listen(self):
        if not select.select([self.process.stdout], [], [], self.answer_sec)[0]:
            self.process.kill()
            raise ValueError(f'{self.command} has not answered for {self.answer_sec} s, and was ended')
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            last = ' | '.join(self.log.read().decode(errors='replace').strip().splitlines()[-3:]) or 'none'
            raise ValueError(f'{self.command} has ended with code {code}; its last lines: {last}')
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ValueError(f'{self.command} said {line[:80]!r}; '
                             'nothing but JSON objects may go to its standard output')
        if 'error' in answer:
            raise ValueError(f'{self.command}: {answer["error"]}')
        return answer

    def ask(self, **request):
        with self.lock:
            try:
                self.process.stdin.write(json.dumps(request).encode() + b'\n')
            except BrokenPipeError:
                pass            # it has died; listen finds out of what
            return self.listen()

    def close(self):
        self.process.communicate()      # closes its stdin, and so ends it
