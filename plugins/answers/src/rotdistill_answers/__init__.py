"""Let variants answer the held-out questions, and compare the answers with the teacher's."""
