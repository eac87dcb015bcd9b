"""The passes over Dynamo's graph, one a file."""
