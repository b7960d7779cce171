"""The contract between the person, the operator and the stages. Pydantic and the standard library only."""
