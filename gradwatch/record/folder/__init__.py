"""The run folder: what a run leaves on the disk, readable by every data tool.

::

    runs/a/
      meta.json                                  the layout of the model; per session the versions,
                                                 optimizers and options
      steps/0001-0000000000-0000000063.parquet   one row per optimizer step
      parameters/0001-0000000000-0000000063.parquet   one row per step and parameter
      events/0001.jsonl                          one line of JSON per event
      .lock                                      while a process writes: which one

Each process that writes is a *session*; a *row* is a step of one, counted from 0. The name of a
part says its session and its first and last row. A part is written under another name, synced and
then renamed, and never changed afterwards, so that a process killed at any moment leaves parts that
are whole. Of one delivery the events come first, then the parameters, then the steps: only what has
its row in ``steps/`` exists for :func:`gradwatch.load`, and an event says in ``row`` which one it
waits for.

*Merging*: the merged part appears first, then the merged ones go. A reader leaves out a part whose
rows another one covers, and lists a folder until two listings agree: it sees each row once. Other
tools may see rows twice for that moment; ``docs/run-folder.md`` tells how to drop them.

*Resuming*: where a later session has steps of an optimizer, steps of earlier sessions from its
first one on are void, and so are their events. Readers apply that rule, so that it holds from the
instant in which the later session's first part appears; the session then rewrites the parts without
those rows, for the tools that do not know the rule.

``steps/`` has the fields of :class:`~gradwatch.StepRecord` and ``row``; ``parameters/`` has

===================== ================== ==========================================================
column                type               meaning
===================== ================== ==========================================================
``row``               int64              row of the step in this session
``step``              int64              optimizer step
``optimizer``         string             label of the optimizer
``parameter``         string             name; parameters without a gradient have no row
``grad_norm``         float32 (float64)  before the clip; float64 from the first norm on that no
                                         float32 holds
``grad_norm_clipped`` the same           after the clip; null where it is ``clip_coef`` of the step
                                         times ``grad_norm``, which is nearly everywhere
statistics            float64            as ``watch(statistics=)`` says; null where not taken
===================== ================== ==========================================================

Why long, one row per step and parameter, and not a column per parameter: the files of two models
have the same columns, any parameter name is just a value, and 100,000 parameters are rows rather
than 100,000 column headers in each part. Parts are sorted by parameter name and then row, so names
and steps take next to no room, a step and parameter take 3.1 bytes, and one parameter's curve is
read from the row groups that the file's own statistics point at.
"""
