"""A run as one HTML file: what it is, what it did, what came of it; to attach to a mail, print, or put before a reviewer.

Reads a run's folder, writes RUN/report.html. Everything is in that one file, its pictures and colours too, and no script
is needed to read it, so that it shows the same in ten years.
"""
