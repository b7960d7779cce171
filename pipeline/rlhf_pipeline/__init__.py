"""What runs inside a stage: one file a stage, and what the stages share."""
