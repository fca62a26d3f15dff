"""Router-Tuning: routers that let a pretrained decoder skip whole branches."""
