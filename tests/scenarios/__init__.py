"""Protocol stories: scripted commands through both real cores, compared with a golden transcript.

``script.py`` reads the ``*.txt`` files and runs their commands; ``stage.py`` is the cluster on which they
take effect; ``transcript.py`` says what of it is told, and how. See ``README.md`` for the language.
"""
