"""Exports of a run's experts in the forms that diffusers, PEFT and ComfyUI load, each checked by plain diffusers.

``export.py`` is the whole of it: a plan of what is written (``plan.py``), a file a format, the model card
(``card.py``), and the check in a process of its own (``check.py``, ``plain_pipeline.py``).
"""
