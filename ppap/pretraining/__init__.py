"""Pretraining of a ViT on unlabelled images; the command is ``ppap.pretrain``, the loop ``pretrainer.py``.

What is learned: ``objective.py`` (from a moving average of itself), or ``distillation.py`` (from a trained
network, ``teacher.py``, and measured by ``agreement.py``). Crops: ``views.py``. Settings:
``ppap.settings.pretraining``.
"""
