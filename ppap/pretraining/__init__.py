"""Self-distillation of a ViT on unlabelled images; the loop is in ``ppap.pretrain``.

Read ``objective.py`` for what is learned, ``views.py`` for the crops, ``config.py`` for the settings.
"""
