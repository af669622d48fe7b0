"""A template: a training program of one's own, run as a command and listened to."""
