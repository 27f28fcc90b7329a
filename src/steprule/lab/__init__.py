"""The command line, and what a task of your own is made of.

`steprule train --task FILE.py:function` trains what `function()` returns: a `Task`.
"""

from steprule.lab.tasks import Score, Task, accuracy

__all__ = ["Score", "Task", "accuracy"]
