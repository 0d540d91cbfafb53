"""What forks.py runs is what python runs."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = '''
import os, sys
print(sys.argv, __name__, __file__, sys.path[0], os.getcwd())
print(os.environ['GIVEN'], sys.stdin.read(), flush=True)
print('said', file=sys.stderr)
END
'''


@pytest.mark.parametrize('end', ['', 'sys.exit(3)', 'sys.exit("a sentence")', 'os.kill(os.getpid(), 9)'])
def test_as_by_python(forks, tmp_path, end):
    (tmp_path / 'a.py').write_text(SCRIPT.replace('END', end))
    words = [str(tmp_path / 'a.py'), 'one', '--two=2']
    env = dict(os.environ, GIVEN='x', PYTHONPATH=str(ROOT))
    real = subprocess.run([sys.executable, *words], env=env, cwd='/', input='in', text=True,
                          capture_output=True)
    fork, = forks.run((words, env, '/'), input='in')
    assert (fork.returncode, fork.stdout, fork.stderr) == (real.returncode, real.stdout, real.stderr)


def test_an_error_has_a_traceback_and_ours_is_imported_anew(forks, tmp_path):
    (tmp_path / 'a.py').write_text('import sys\nprint("train" in sys.modules)\nimport train\n1 / 0')
    fork, = forks.run(([tmp_path / 'a.py'], dict(os.environ, PYTHONPATH=str(ROOT)), tmp_path))
    assert fork.returncode == 1 and fork.stdout == 'False\n'
    assert 'Traceback' in fork.stderr and fork.stderr.endswith('ZeroDivisionError: division by zero\n')
