"""
Runs programs without the two seconds that importing torch takes: a Python that has imported it forks for
each. What is run is what python would run, from the first line to the exit code; of our own modules none is
there before.
"""
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Forks:
    """The other end of the Python that forks."""
    def __init__(self):
        self.server = None

    def run(self, *processes, input=''):
        """Each is words, environment, folder. They run side by side -> a CompletedProcess of each"""
        if self.server is None:     # of one thread: a process of several cannot fork
            self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True,
                                           stdout=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS='1'))
        with tempfile.TemporaryDirectory() as top:
            (Path(top) / 'in').write_text(input)
            files = [[f'{top}/in', f'{top}/out{i}', f'{top}/err{i}'] for i in range(len(processes))]
            order = [[list(map(str, words)), env, str(folder), *paths]
                     for (words, env, folder), paths in zip(processes, files)]
            print(json.dumps(order), file=self.server.stdin, flush=True)
            codes = json.loads(self.server.stdout.readline())
            return [subprocess.CompletedProcess(words, code, Path(out).read_text(), Path(errors).read_text())
                    for (words, *_), code, (_, out, errors) in zip(processes, codes, files)]

    def close(self):
        if self.server is not None:
            self.server.communicate()


def serve():
    """Forks for each process of each line until there are no more -> in a fork: its script; else None"""
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), 'w')
    for line in orders:
        children = []
        for words, env, folder, *files in json.loads(line):
            child = os.fork()
            if child == 0:
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(env)
                for i, (path, mode) in enumerate(zip(files, (os.O_RDONLY, *2 * [os.O_WRONLY | os.O_CREAT]))):
                    os.dup2(os.open(path, mode), i)
                own = [os.path.dirname(words[0]), *env.get('PYTHONPATH', '').split(':')]
                sys.argv[:], sys.path[:1] = words, [path for path in own if path]
                return words[0]
            children.append(child)
        print(json.dumps(wait(children)), file=answers, flush=True)


def wait(children):
    """-> their exit codes. 30 s after one has failed those that wait for it are killed, as torchrun does."""
    codes, last = {}, math.inf
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
            last = min(last, time.monotonic() + 30) if codes[child] else last
        elif time.monotonic() < last:
            time.sleep(0.005)
        else:
            for other in {*children} - {*codes}:
                os.kill(other, signal.SIGKILL)
            last = math.inf
    return [codes[child] for child in children]


if __name__ == '__main__':
    import torch._dynamo
    import torch.distributed.fsdp  # noqa: F401
    script = serve()
    if script:
        runpy.run_path(script, run_name='__main__')
