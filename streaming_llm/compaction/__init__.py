"""A compaction, its order and its stages: functions of what the heads hold, which know no layer and no model."""
