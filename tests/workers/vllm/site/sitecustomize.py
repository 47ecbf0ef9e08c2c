"""On the path of vLLM's child processes when pytest starts them: their main module is pytest, which does not import
``dapo_async`` and so would not hide PyTorch's broken companions. Workers started as users do need no such help.
"""

import dapo_async  # noqa: F401
