"""A result says where it comes from."""
import os
import sys

import torch
from conftest import ROOT

from common.origin import describe_run, git


def test_a_result_names_command_commit_machine_and_versions(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['/somewhere/evaluate.py', '--checkpoint=out/demo'])
    origin = describe_run()
    assert origin['command'] == 'python evaluate.py --checkpoint=out/demo'
    assert torch.__version__.startswith(origin['versions']['torch'])      # which may lack "+cu130"
    assert origin['machine']['cores'] == os.cpu_count()
    assert '/somewhere' not in str(origin)
    assert len(origin['commit'] or '') == (40 if (ROOT / '.git').exists() else 0)


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert git('rev-parse', 'HEAD') == '' and describe_run()['commit'] is None
